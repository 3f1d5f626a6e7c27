# Run a job's Python: `sh clusters/python.sh -m pipelines STAGE ...` takes the interpreter that Ray starts its workers
# with on this node. What is called `python` in the PATH of Ray's head may be another one, or nothing.

python=
process=$PPID
# Ray's raylet, which has that interpreter in its command line, is an ancestor of every job.
while [ -z "$python" ] && [ "${process:-0}" -gt 0 ]; do
    python=$(tr '\0' '\n' <"/proc/$process/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=\([^ ]*\).*/\1/p')
    process=$(sed 's/.*) [A-Za-z] //; s/ .*//' "/proc/$process/stat" 2>/dev/null)
done
[ -x "$python" ] || python=python
exec "$python" "$@"
