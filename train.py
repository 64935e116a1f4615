from pathlib import Path
from bestiary.compose import entry_point
def main(run, cfg): print(run)
entry_point(main, config_path=Path(__file__).parent / "conf")
