"""Training: one loop, the state that it resumes from, and the processes that it runs on."""
