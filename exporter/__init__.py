"""A finished training run becomes a model repository that anybody can load, with provably right weights.

    CHECKPOINT ─ open ─▶ Checkpoint ─ settle ─▶ Vocabulary ─ account ─▶ weights ─ plan ─▶ ExportPlan
               ─ write ─▶ files + Manifest ─ verify ─▶ Checks ─ publish ─▶ Publication

Everything is known before the first byte is written: opening reads metadata only, and the tokenizer is settled before
the plan because added tokens change the shape of the embedding. Weights are lazy tensors that are read in blocks when
they are written. Stages exchange values and do not import one another; ``export.py`` alone knows their order.
"""

__version__ = "0.1.0"
