from cde_jax.retrieval.centre import LETTERS, SIZE, beginnings


def test_beginnings_are_the_first_words_of_a_sample():
    names = ["".join(chr(ord("a") + int(digit)) for digit in f"{i:03}") for i in range(SIZE + 50)]
    corpus = [f"a document named {name} " + "and so on " * 9 for name in names]
    found = beginnings(corpus, seed=1)
    assert len(found) == SIZE and found == beginnings(corpus, seed=1) != beginnings(corpus, seed=2)
    assert all(text.split() == corpus[names.index(text.split()[3])].split()[:12] for text in found)
    places = [names.index(text.split()[3]) for text in found]
    assert places == sorted(set(places))


def test_beginnings_are_of_plain_words():
    code = 'numpy.linalg.solve(a, b)  """Solves A x = b, for the 2nd time: a well-known (LAPACK) "don’t care" x_1'
    assert beginnings([code]) == ["b Solves A x b for the time a well-known LAPACK don’t"]


def test_beginnings_of_few_short_and_unspaced_texts():
    assert beginnings(["one", "two  words\n", "", "x_1 = 2"]) == ["one", "two words", "", "x_1 = 2"]
    assert beginnings(["字" * 500]) == ["字" * LETTERS]
