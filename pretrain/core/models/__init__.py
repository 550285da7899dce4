"""What is known of models: their families and parts, heads and exits, states, likelihoods, quicker arithmetic."""
