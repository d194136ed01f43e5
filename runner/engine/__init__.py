"""How a planned job runs: stage by stage, kept, checkpointed and flushed."""
