from cde_jax.retrieval.centre import LETTERS, SIZE, beginnings


def test_beginnings_are_the_first_words_of_a_sample():
    corpus = [f"document number {i} " + "and so on " * 9 for i in range(SIZE + 50)]
    found = beginnings(corpus, seed=1)
    assert len(found) == SIZE and found == beginnings(corpus, seed=1) != beginnings(corpus, seed=2)
    assert found[0].split() == corpus[int(found[0].split()[2])].split()[:12]
    numbers = [int(text.split()[2]) for text in found]
    assert numbers == sorted(set(numbers))


def test_beginnings_of_few_short_and_unspaced_texts():
    assert beginnings(["one", "two  words\n", ""]) == ["one", "two words", ""]
    assert beginnings(["字" * 500]) == ["字" * LETTERS]
