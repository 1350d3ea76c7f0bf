"""What the paper compares with (section 4.3): token pruning and a smaller student. They know models, no training."""

from llm_variator.baselines.ltp import TokenPruning
from llm_variator.baselines.student import make_student, take_head

__all__ = ["TokenPruning", "make_student", "take_head"]
