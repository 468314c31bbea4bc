//! Lists the VMs of this host that have a runtime directory, and whether they run:
//! `cargo run -p vm --example list-vms`

use vm::launch::command::is_running;
use vm::runtime_dir::RuntimeDir;

fn main() {
    for (_, vm) in RuntimeDir::known(None) {
        let state = if is_running(&vm.instance) { "runs" } else { "has ended" };
        let (name, version, store) = (&vm.name, &vm.qemu_version, &vm.store);
        println!("{name} {state}: QEMU {version}, {} bytes of RAM, store {store}", vm.ram_bytes);
    }
}
