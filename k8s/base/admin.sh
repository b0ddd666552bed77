# admin.sh METHOD PATH: asks Envoy's admin interface, prints head and body, fails unless it says 200.
# Envoy's image has neither curl nor wget, and its admin interface is on loopback, so that only this pod can ask it.
set -eu
exec 3<>"/dev/tcp/127.0.0.1/${ENVOY_ADMIN_PORT:-9901}"
printf '%s %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n' "$1" "$2" >&3
answer=$(cat <&3)
printf '%s\n' "$answer"
[[ $answer == "HTTP/1.1 200 "* ]]
