"""llm_variator inside other projects; each sub-package needs its extra and imports it lazily."""
