"""From sources to batches: documents → split corpus → tokens on disk → packed rows → micro-batches."""
