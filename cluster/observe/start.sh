#!/bin/sh
# Start Prometheus and Grafana on a cluster's head, where they are installed: docs/observe.md. Both listen on loopback.
#
#     sh cluster/observe/start.sh              # after `ray start`
#
# Grafana reads what Ray writes for it (data source, dashboards of the cluster) and Tandem's dashboard, which lies in the
# folder that Ray was told of by RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
home=${TANDEM_OBSERVE:-$HOME/observe}
ray=${TANDEM_RAY_SESSION:-/tmp/ray/session_latest}/metrics/grafana

umask 077
mkdir -p "$home/dashboards" "$home/prometheus" "$home/grafana"
cp "$here/tandem.json" "$home/dashboards/tandem.json"
test -e "$home/prometheus.yml" || cp "$here/prometheus.yml" "$home/prometheus.yml"
test -e "$home/metrics-key" || : > "$home/metrics-key"

# start NAME COMMAND...: in the background, unless one that was started here still runs.
start() {
    name=$1
    shift
    if test -s "$home/$name.pid" && kill -0 "$(cat "$home/$name.pid")" 2> /dev/null; then
        echo "$name runs already"
    elif command -v "$1" > /dev/null; then
        setsid "$@" > "$home/$name.log" 2>&1 < /dev/null &
        echo $! > "$home/$name.pid"
        echo "$name is started, its log is $home/$name.log"
    else
        echo "$name is not installed here: no $1 on the PATH"
    fi
}

start prometheus prometheus --config.file="$home/prometheus.yml" --storage.tsdb.path="$home/prometheus" \
    --web.listen-address=127.0.0.1:9090

# Ray's dashboard writes it soon after `ray start` has returned.
if command -v grafana-server > /dev/null; then
    for _ in $(seq 60); do
        test -e "$ray/grafana.ini" && break
        sleep 1
    done
fi
export GF_SERVER_HTTP_ADDR=127.0.0.1 GF_PATHS_DATA="$home/grafana" GF_PATHS_LOGS="$home/grafana"
start grafana grafana-server --config="$ray/grafana.ini" --homepath="${GRAFANA_HOME:-/usr/share/grafana}"
