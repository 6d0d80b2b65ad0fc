"""Look at what an SAE has learnt: python analyze.py run=outputs/<day>/<time>"""

from sae_lightning.commands import run_analyze

if __name__ == "__main__":
    run_analyze()
