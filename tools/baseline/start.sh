#!/bin/sh
# The baseline's services in a container, where no systemd runs. The container lives as long as the
# inference server does.
set -eu

become() {
    user=$1
    shift
    exec setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
}

ssh-keygen -A
install -d -m 755 /run/sshd
/usr/sbin/sshd
nginx
become prometheus prometheus-node-exporter &
cd /opt/inference
become inference venv/bin/uvicorn server:app --port 8000
