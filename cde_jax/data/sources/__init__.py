"""One file a source; each yields `Pair`s or an `EvaluationSet`."""
