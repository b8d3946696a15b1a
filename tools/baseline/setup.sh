#!/bin/sh
# What makes a Debian system with packages.txt into the baseline server, run in it as root by the
# Dockerfile and by rootfs.py: sh setup.sh FOLDER_WITH_THESE_FILES. pip is told by its environment
# where packages come from.
set -eu
files=$1
home=/opt/inference

useradd --system --home-dir "$home" --create-home --shell /usr/sbin/nologin inference
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --no-cache-dir --disable-pip-version-check --progress-bar=off \
    --requirement "$files/requirements.txt"
install -m 644 "$files/server.py" "$home/server.py"
install -m 755 "$files/start.sh" "$home/start.sh"
install -d -m 755 /srv/model

install -m 644 "$files/sshd.conf" /etc/ssh/sshd_config.d/inference.conf
rm -f /etc/ssh/ssh_host_*  # each machine makes its own
install -m 644 "$files/nginx.conf" /etc/nginx/sites-available/inference
ln -sf /etc/nginx/sites-available/inference /etc/nginx/sites-enabled/inference
rm -f /etc/nginx/sites-enabled/default
install -m 644 "$files/inference.service" /etc/systemd/system/inference.service
systemctl enable inference.service
