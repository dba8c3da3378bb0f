"""`transfuse demo`: an engine answers, trainers learn, every version goes back."""
