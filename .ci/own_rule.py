"""Write the embedded text defense with the TopK rule of its SAEs, for which calibrated thresholds stand in as it ships.

python .ci/own_rule.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from defense.hosts.clip import embedded_folder
from defense.hosts.shipped import EMBEDDED, MODELS
from defense.hosts.slim import restored
from defense.store import checkpoint, defenses


def main(folder: Path) -> None:
    """Write the defense into a folder that does not exist.

    Raises:
        ValueError: A site has no TopK rule.
    """
    shipped = defenses.load(embedded_folder("text"))
    whole = restored(shipped, [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])], own_rule=True)
    for site in whole.sites:
        if site.sae_config.act != "topk":
            raise ValueError(f"the SAE at {site.hook_point} has the rule {site.sae_config.act}; want topk")
    defenses.save(whole, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
