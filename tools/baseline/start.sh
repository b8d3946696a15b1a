#!/bin/sh
# The baseline's services in a container, where no systemd runs. The container lives as long as the
# inference server does.
set -eu

as() {
    user=$1
    shift
    setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
}

ssh-keygen -A
install -d -m 755 /run/sshd
/usr/sbin/sshd
nginx
as prometheus prometheus-node-exporter &
cd /opt/inference
as inference venv/bin/uvicorn server:app --port 8000
