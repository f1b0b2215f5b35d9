#!/bin/sh
# Quantize a model, judge it against its 16-bit self, publish the verdict: one step of any CI, or a terminal.
#
# usage: gate.sh MODEL OUT [option of `quantlab eval` ...]
#   OUT/model    the quantized model      OUT/report   report.json, report.html, junit.xml, summary.md
# exit:  0 pass, 10 fail, 11 inconclusive, anything else an error of the run itself (docs/exit_codes.md)
#
# settings, from the environment:
#   QUANTIZE            options of `quantlab quantize`              (default: --scheme w4a16 --quality balanced)
#   INCONCLUSIVE        pass | fail: what too little data means     (default: fail)
#   QUANTLAB            the command                                 (default: quantlab)
#   GITHUB_STEP_SUMMARY where the summary goes; GitHub sets it      (default: the terminal)
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 out=$2
shift 2
quantlab=${QUANTLAB:-quantlab}
options=${QUANTIZE:---scheme w4a16 --quality balanced}
inconclusive=${INCONCLUSIVE:-fail}
case $inconclusive in pass | fail) ;; *) echo "INCONCLUSIVE is pass or fail, not '$inconclusive'" >&2; exit 2 ;; esac

mkdir -p "$out"
rm -rf "$out/report"   # a report of an earlier run must not be published as this one's
# Unquoted on purpose: both may hold several words.
$quantlab quantize "$model" --out "$out/model" --force $options || {
    status=$?
    mkdir -p "$out/report"
    cat > "$out/report/junit.xml" << XML
<?xml version="1.0" encoding="utf-8"?>
<testsuites name="quantlab quantize" tests="1" failures="0" errors="1" time="0">
  <testsuite name="quantlab quantize" tests="1" failures="0" errors="1" skipped="0" time="0">
    <testcase classname="quantlab.quantize" name="quantize" time="0">
      <error type="exit code $status" message="nothing was quantized, so there is nothing to judge; see the log"/>
    </testcase>
  </testsuite>
</testsuites>
XML
    echo "gate: no verdict, quantizing ended with exit code $status"
    exit "$status"
}

status=0
$quantlab eval "$out/model" --baseline "$model" --out "$out/report" "$@" || status=$?

if [ -f "$out/report/summary.md" ]; then
    if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
        cat "$out/report/summary.md" >> "$GITHUB_STEP_SUMMARY"
    else
        cat "$out/report/summary.md"
    fi
fi

case $status in
    0) echo "gate: pass" ;;
    10) echo "gate: fail" ;;
    11)
        echo "gate: inconclusive, counted as $inconclusive"
        [ "$inconclusive" = fail ] || status=0
        ;;
    *) echo "gate: no verdict, the evaluation ended with exit code $status" ;;
esac
exit "$status"
