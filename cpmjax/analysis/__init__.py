"""What a series of checkpoints tells. One study a file, each a pure function of parameters, or of a Series and text."""
