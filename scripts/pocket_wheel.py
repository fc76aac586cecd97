"""Install the wheel in an empty environment, take the network away, and time `pocket`.

    python scripts/pocket_wheel.py WORK

WORK gets the wheel and the environment. A second call builds the wheel anew and installs it there.
Timed is the command
`clipcap_caption pocket` on drawn photos, as a user would call it: from the start of the process to
the first caption of one photo, and a folder of 64. Captions per second are of one process that has
loaded the captioner already. Each figure is the median of three. The network is off: the commands
run in a network namespace of their own (`unshare`), in which there is no address but its own."""
import json, os, platform, shutil, statistics, subprocess, sys, time
from pathlib import Path
from fastcore.script import call_parse
from clipcap_ssl.core import write_json
from grid import commit

offline = ['unshare', '--map-root-user', '--net']

inside = """
import json, sys, time, torch
from pathlib import Path
from clipcap_ssl import Captioner
photos = sorted(map(str, Path(sys.argv[1]).iterdir()))
captioner = Captioner.from_pretrained('pocket')
captioner.assess(photos[0])
start = time.perf_counter()
for photo in photos[:16]: captioner.assess(photo)
alone = 16/(time.perf_counter()-start)
start = time.perf_counter()
captioner.assess(photos)
batch = len(photos)/(time.perf_counter()-start)
print(json.dumps(dict(alone=alone, batch=batch, threads=torch.get_num_threads(),
                      torch=torch.__version__)))
"""

draw = """
import sys
from pathlib import Path
from clipcap_ssl.data.scenes import ToyScenes
scenes = ToyScenes(64, seed=0)
for i in range(64):
    scenes.image(i).resize((640, 480)).convert('RGB').save(Path(sys.argv[1])/f'{i:02}.jpg')
"""

def install(work):
    "An environment with nothing in it but our wheel and what that needs; its python"
    python = work/'env'/'bin'/'python'
    top = Path(__file__).resolve().parent.parent
    source = work/'source'
    shutil.rmtree(source, ignore_errors=True)
    names = subprocess.check_output(['git', 'ls-files', '-z', '--cached', '--others',
                                     '--exclude-standard'], cwd=top, text=True)
    for name in filter(None, names.split('\0')):
        if not (top/name).is_file(): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(top/name, source/name)
    def run(*args): subprocess.run(list(map(str, args)), check=True, cwd=work)
    run(sys.executable, '-m', 'pip', 'wheel', source, '--no-deps', '-w', work)
    if not python.exists(): run(sys.executable, '-m', 'venv', work/'env')
    wheel = next(work.glob('clipcap_ssl-*.whl'))
    run(python, '-m', 'pip', 'install', '-c', top/'constraints.txt', wheel)
    run(python, '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel)
    return python

def timed(args, cwd):
    "Seconds to the first line and to the end, lines, and peak memory of a process, in megabytes"
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, args)), cwd=cwd, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    first = time.perf_counter()-start
    lines = 1+sum(1 for _ in process.stdout)
    _,status,used = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'{args[-2:]} ended with status {status}')
    return dict(first=first, end=time.perf_counter()-start, lines=lines,
                megabytes=used.ru_maxrss/1024)

def medians(rows):
    "The median of each figure"
    return {k:statistics.median(o[k] for o in rows) for k in rows[0]}

@call_parse
def main(
    work:Path, # Folder for the wheel, the environment and the photos
    out:Path=Path('nbs/results/data/pocket_wheel.json'), # Gets the figures
    repeats:int=3, # of each measurement
):
    "Time pocket as it is after installation, without a network"
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = install(work)
    photos = work/'photos'
    if not photos.exists():
        photos.mkdir()
        subprocess.run([python, '-c', draw, photos], check=True, cwd=work)
    command = [*offline, python.parent/'clipcap_caption', 'pocket']
    before = os.getloadavg()[0]
    one = [timed([*command, photos/'00.jpg'], work) for _ in range(repeats)]
    many = [timed([*command, photos], work) for _ in range(repeats)]
    speed = [json.loads(subprocess.check_output([*offline, python, '-c', inside, photos], cwd=work))
             for _ in range(repeats)]
    assert one[0]['lines']==1 and many[0]['lines']==64
    fixed = {k:speed[0][k] for k in ('threads','torch')}
    speed = medians([{k:o[k] for k in ('alone','batch')} for o in speed])
    size = next(work.glob('*.whl')).stat().st_size/1e6
    write_json(out, dict(commit=commit(), wheel_megabytes=size,
        python=platform.python_version(), cores=os.cpu_count(), load_before=before, repeats=repeats,
        one=medians(one), folder=medians(many), per_second=speed, **fixed))
    print(out.read_text())
