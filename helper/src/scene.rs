//! For tests: a scripted VM without disks, its runtime directory, and a thread that plays a helper.

use crate::ToCome;
use crate::server::{self, Server};
use engine::checkpoint::Checkpointer;
use scripted_vm::{Body, ScriptedQemu, Version};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;
use tempfile::TempDir;
use vm::running::Vm;
use vm::runtime_dir::{RuntimeDir, VmFile};

/// Pages of `pc.ram` and of `vga.vram`.
pub(crate) const PAGES: (usize, usize) = (256, 16);

/// The runtime directory of a VM that is named `vm`, and nothing in it.
pub(crate) struct Place {
    pub runtime: RuntimeDir,
    pub directory: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("sp-").tempdir().unwrap();
        let base = directory.path().join("run");
        let runtime = RuntimeDir::new(Some(&base), &"vm".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        Self { runtime, directory }
    }

    /// What a VM in `process` has in its `machine.json`.
    pub(crate) fn file(&self, process: u32) -> VmFile {
        let path = self.directory.path();
        let machine_type = Version::V10_0.machine_type();
        VmFile {
            format: VmFile::FORMAT,
            name: "vm".parse().unwrap(),
            store: format!("file://{}/store", path.display()),
            // Of this place alone: an instance is looked for among all processes of the host.
            instance: path.file_name().unwrap().to_str().unwrap().to_lowercase().replace('-', ""),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            pid: Some(process),
            qemu_version: "10.0.2".into(),
            arguments: ["-machine", &machine_type, "-m", "1M"].map(str::to_owned).to_vec(),
            machine_type,
            accelerator: "tcg".into(),
            ram_bytes: (PAGES.0 * 4096) as u64,
            ram_block: "pc.ram".into(),
            directory: path.to_owned(),
            fleecing: path.to_owned(),
            restored_from: None,
            external: None,
        }
    }

    /// A thread plays the helper for one command: it sends these lines, then hangs up. What it
    /// was asked is returned.
    pub(crate) fn helper(&self, answer: &[&str]) -> JoinHandle<String> {
        let listener = UnixListener::bind(self.runtime.control()).unwrap();
        let answer: String = answer.iter().map(|line| format!("{line}\n")).collect();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut request).unwrap();
            // A command that has heard enough may be gone.
            let _ = stream.write_all(answer.as_bytes());
            request
        })
    }
}

/// A VM that runs.
pub(crate) struct Scene {
    pub qemu: ScriptedQemu,
    pub body: Body,
    pub place: Place,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let place = Place::new();
        let body = Body::start(place.directory.path(), &place.runtime.plugin(), PAGES, &[]);
        let qemu = ScriptedQemu::new(Version::V10_0, body.ram());
        qemu.with(|state| (0..32).for_each(|page| state.ram.fill(0, page, page as u8 + 1)));
        qemu.listen(&place.runtime.qmp()).unwrap();
        place.runtime.save_vm(&place.file(body.pid())).unwrap();
        Self { qemu, body, place }
    }

    pub(crate) fn runtime(&self) -> RuntimeDir {
        self.place.runtime.clone()
    }

    pub(crate) async fn vm(&self) -> Vm {
        Vm::attach(self.runtime()).await.unwrap()
    }

    /// A helper of the VM, which listens.
    pub(crate) async fn server(&self) -> Server {
        let server = Server::new(Checkpointer::new(self.vm().await), ToCome::default());
        let (serving, listener) = (server.clone(), server::listen(&self.place.runtime).unwrap());
        tokio::spawn(async move { serving.run(listener).await });
        server
    }
}
