import json
import sys
from pathlib import Path

from mim_core.jobs import main, work

if __name__ == "__main__":
    if sys.argv[1:]:
        work(json.loads(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
