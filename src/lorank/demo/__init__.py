"""The demo: LoRA on real weights and real data that every Python brings along."""
