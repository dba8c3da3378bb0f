"""`transfuse demo`: an engine answers, trainers learn from it, and every version goes back into it."""
