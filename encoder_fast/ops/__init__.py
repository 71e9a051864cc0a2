"""The operations of an encoder, one file each: ``attention``, ``add_layer_norm``,
``embed_layer_norm``, ``linear`` and ``pool``.

Each file has the public function, which validates and chooses a backend; the operator registered
with ``torch.library``; and ``run``, the engine's way in, which does neither again. The plain
PyTorch reference of all of them is the backend ``reference``.
"""
