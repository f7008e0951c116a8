from jlora.extras import require_extra

require_extra("cli", "jlora.tasks")
