"""llm_variator inside other tools. Importing this package imports none of them."""
