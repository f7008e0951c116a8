from jlora.extras import require_extra

require_extra("hf", "jlora.hf")
