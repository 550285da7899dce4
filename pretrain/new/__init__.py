"""`pretrain new`: looks at a folder or a file (`look`, `tables`), and writes a recipe for it (`plans`, `stages`)."""

TASKS = ("pretrain", "continue", "classify", "regress", "chat", "compress")
