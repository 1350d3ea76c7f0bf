"""llm_variator inside other projects; each integration needs its extra and imports it lazily."""
