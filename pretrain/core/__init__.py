"""The parts that know nothing of methods: errors, files, the list of methods, batches, families, checkpoints, meter."""
