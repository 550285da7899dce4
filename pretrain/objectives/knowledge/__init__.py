"""Encoders go on with what people know beside the text: concepts and how they are related, tags of words, facts."""
