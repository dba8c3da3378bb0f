"""`transfuse demo --pretrain`: two FSDP2 trainers refit a running inference process."""
