"""What the model class says, asked on the meta device: names, shapes, ties, dtype policy, and names on disk.

No weight is ever loaded into the model, and nothing is downloaded. :mod:`model` builds the class that config.json
names; :mod:`expectations` asks it; :mod:`origin` finds out what a file's tensors consist of where transformers keeps
them fused in memory; :mod:`layers` finds the modules that a pipeline's layers are; :mod:`accounting` matches a
checkpoint's tensors with all that.
"""

from exporter.architecture.accounting import Account, account
from exporter.architecture.expectations import Architecture, ask_architecture
from exporter.architecture.layers import name_layers
from exporter.architecture.model import quiet_library
from exporter.architecture.origin import Origin, Piece

__all__ = ["Account", "Architecture", "Origin", "Piece", "account", "ask_architecture", "name_layers", "quiet_library"]
