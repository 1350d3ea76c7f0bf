"""Plugin training by distillation (paper section 3.3)."""
