#!/bin/busybox sh
# The first process of an emulated machine: makes it an ordinary host, runs the
# programs of /plan in turn and reports each one's status behind its output.
export PATH=/bin HOME=/root
if [ ! -d /proc ]; then
	# pivot_root(2) does not work in an initramfs, so everything moves to a tmpfs.
	/bin/busybox mkdir /new
	/bin/busybox mount -t tmpfs -o mode=755,size=80% root /new
	for f in bin init kvm plan test; do
		[ ! -e /$f ] || /bin/busybox cp -a /$f /new/
	done
	/bin/busybox mkdir -p /new/dev /new/etc /new/proc /new/root /new/sys /new/tmp /new/usr /new/var
	exec /bin/busybox switch_root /new /init
fi
/bin/busybox --install -s /bin
ln -s bin /sbin
ln -s ../bin /usr/bin
ln -s ../tmp /var/tmp
chmod 1777 /tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t devtmpfs dev /dev
mkdir /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
ln -s /proc/self/fd /dev/fd
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >/etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' >/etc/group
echo 127.0.0.1 localhost >/etc/hosts
hostname emulated
ip link set lo up
ulimit -H -n 1048576
exec </dev/null >/dev/vport0p1 2>&1
if [ -d /kvm ]; then
	for module in irqbypass kvm kvm-amd; do
		[ ! -e /kvm/$module.ko.xz ] || { unxz /kvm/$module.ko.xz && insmod /kvm/$module.ko; }
	done
	[ -c /dev/kvm ] || { echo "the emulated machine has no /dev/kvm"; poweroff -f; }
fi
. /plan
poweroff -f
