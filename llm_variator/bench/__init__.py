"""`python -m llm_variator.bench`: measured speed beside the bound that the remaining arithmetic or bytes set."""
