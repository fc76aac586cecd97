"Run a command, then say on stderr what it cost: python scripts/measure.py COMMAND [ARGUMENT...]"
import resource, subprocess, sys, time

def main(cmd):
    "Run `cmd`, print its wall-clock and CPU seconds and its peak memory, and return its exit status."
    start = time.perf_counter()
    rc = subprocess.run(cmd).returncode
    wall, use = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = use.ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20)
    print(f'{wall:.1f} s wall, {use.ru_utime + use.ru_stime:.1f} s CPU (all processes that were waited for), '
          f'{peak:.2f} GiB peak in the largest process, exit status {rc}', file=sys.stderr)
    return rc if rc >= 0 else 128 - rc

if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
