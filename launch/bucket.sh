# shellcheck shell=bash
# Sourced by worker.sh. mount_bucket NAME FOLDER: mounts a bucket with gcsfuse, which is installed if it is missing.

mount_bucket() {
  local name=$1 folder=$2 record=$HOME/simvlg_jax/state/bucket
  if findmnt --mountpoint "$folder" >/dev/null; then
    [ "$(cat "$record" 2>/dev/null)" = "$name" ] ||
      fail "$HOSTNAME: $folder holds another bucket, $(cat "$record"); fusermount -u $folder"
    if ls "$folder" >/dev/null 2>&1; then return; fi
    fusermount -u "$folder" # its gcsfuse is gone
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  mkdir -p "$folder"
  # Nothing is cached: a worker must see at once what another one has written, or found missing a moment ago.
  # Checkpoints need no folder renamed; what does is allowed to, file by file, up to this many.
  set -- --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$name" "$folder"
  if ! mount_as_unit "$@"; then
    say "$HOSTNAME: note: gcsfuse is no systemd unit here; when the machine goes down it may end before training saves"
    gcsfuse "$@" >&2 8>&- ||
      fail "$HOSTNAME: cannot mount gs://$name; may the workers' service account write to it (roles/storage.objectUser)?"
  fi
  printf '%s\n' "$name" >"$record"
}

# When the machine goes down, all that ssh sessions have started is told to end at once. Training saves then, and needs
# the bucket. Units end in the reverse order of their start: this one after the sessions, before the network.
mount_as_unit() {
  local folder=${*: -1} unit=simvlg-bucket
  sudo -n systemctl stop "$unit" 2>/dev/null || true # as nothing is mounted, one that is still there is of no use
  sudo -n systemd-run --quiet --collect --unit="$unit" --uid="$(id -u)" --gid="$(id -g)" \
    --property=After=network-online.target --property=Before=systemd-user-sessions.service \
    gcsfuse --foreground "$@" || return 1
  for _ in $(seq 200); do
    if findmnt --mountpoint "$folder" >/dev/null; then return; fi
    systemctl is-active --quiet "$unit" || break
    sleep 0.1
  done
  sudo -n systemctl stop "$unit" 2>/dev/null || true
  return 1
}

install_gcsfuse() {
  local keyring=/usr/share/keyrings/cloud.google.asc codename
  local apt=(sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600) # new VMs update themselves
  say "$HOSTNAME: installing gcsfuse"
  codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  {
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keyring" >/dev/null &&
      echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-$codename main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
      "${apt[@]}" update && "${apt[@]}" install --yes gcsfuse >/dev/null
  } || fail "$HOSTNAME: could not install gcsfuse by apt"
}
