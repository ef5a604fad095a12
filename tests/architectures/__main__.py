import sys

from . import check_all


if __name__ == "__main__":
    check_all(sys.argv[1:])
