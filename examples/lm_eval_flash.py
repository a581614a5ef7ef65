"""lm-evaluation-harness on models from flash, through its own `hf` model: `import hf_flash` is all that it takes.

    pip install 'hf_flash[eval]'
    HF_FLASH_MEMORY=1GiB python examples/lm_eval_flash.py --model hf --model_args pretrained=./opt-1.3b-flash \\
        --tasks piqa,arc_easy --batch_size 8

Every option is lm_eval's own. `HF_FLASH_MEMORY` is the cap. A folder or repo that `hf-flash repack` made runs with the
gate that its config.json names, which is `auto` unless somebody wrote another.
"""

from __future__ import annotations

import hf_flash  # registers the backend with transformers, which lm_eval loads models with

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    print(f"hf_flash {hf_flash.__version__}: models are loaded from flash where their config.json says so")
    cli_evaluate()
