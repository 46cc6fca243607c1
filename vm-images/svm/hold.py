#!/usr/bin/python3
"""Keeps a VM with a vCPU for as long as the guest runs; says `ready` when it has them.

KVM patches kernel code when the first VM comes and when the last one goes (preempt_notifier_key,
which the scheduler looks at), and the same for vCPUs without a local APIC (kvm_has_noapic_vcpu).
QEMU 7.2 may go on executing what it has translated of the code meanwhile on another CPU: the int3
that Linux puts there for a moment, for ever.  With a VM that stays nothing is patched any more.
"""

import fcntl
import os
import signal
import sys

KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41

vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)
vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
sys.stdout.write("ready\n")
sys.stdout.flush()
signal.pause()
