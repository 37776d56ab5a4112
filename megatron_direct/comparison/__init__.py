"""Does it help? Ways of selecting, compared by annealing on what they select."""
