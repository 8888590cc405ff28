#!/bin/sh
# Runs nvcc and keeps what the assembler says of each kernel beside the object, as OBJECT.ptxas.
object= previous=
for word in "$@"; do
  [ "$previous" = -o ] && object=$word
  previous=$word
done
"$@" 2> "$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' -e '^$' "$object.ptxas" >&2
exit $status
