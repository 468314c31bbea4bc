//! What each command does, but for those of disks and of a migration.

use std::fs::File;
use std::os::fd::OwnedFd;

use serde_json::{Value, json};

use crate::State;
use crate::state::{FdSet, Refusal, Reply};

/// Beyond those that are carried out: known to QEMU, which a client may ask.
const SET_ACTIVE: &str = "blockdev-set-active";
const SET_ACTIVE_SINCE: u32 = 10;

fn text<'a>(arguments: &'a Value, name: &str) -> &'a str {
    arguments[name].as_str().unwrap_or_default()
}

impl State {
    /// Carries out one command.
    ///
    /// # Errors
    /// QEMU's class and words.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<OwnedFd>,
    ) -> Reply {
        if let Some(answer) = self.ask(command, arguments) {
            return answer;
        }
        match command {
            "qmp_capabilities" => {}
            "stop" => self.stop(),
            "cont" => return self.order_cont(),
            "system_reset" => self.reset(),
            "object-add" => return self.object_add(arguments),
            "object-del" => return self.object_del(text(arguments, "id")),
            "getfd" => {
                let Some(fd) = fd else {
                    return Err(Refusal::generic("No file descriptor supplied via SCM_RIGHTS"));
                };
                self.fds.insert(text(arguments, "fdname").to_owned(), fd);
            }
            "closefd" => {
                let name = text(arguments, "fdname");
                if self.fds.remove(name).is_none() {
                    return Err(Refusal::generic(format!(
                        "File descriptor named '{name}' not found"
                    )));
                }
            }
            "add-fd" => return self.add_fd(text(arguments, "opaque"), fd),
            "remove-fd" => {
                let id = arguments["fdset-id"].as_u64().unwrap_or_default();
                if self.sets.remove(&id).is_none() {
                    return Err(Refusal::generic(format!(
                        "File descriptor named 'fdset-id:{id}' not found"
                    )));
                }
            }
            "xen-save-devices-state" => return self.save_devices(text(arguments, "filename")),
            "device_add" => {
                let path = format!("/machine/peripheral/{}", text(arguments, "id"));
                self.devices.push((path, text(arguments, "driver").to_owned()));
            }
            "device_del" => {
                let path = format!("/machine/peripheral/{}", text(arguments, "id"));
                self.devices.retain(|(known, _)| *known != path);
                self.event("DEVICE_DELETED", json!({ "device": arguments["id"], "path": path }));
            }
            "quit" => self.quit(),
            "announce-self" => {}
            "migrate-incoming" => return self.migrate_incoming(text(arguments, "uri")),
            _ if command.starts_with("migrate") => return self.migrate_command(command, arguments),
            _ => return self.block_command(command, arguments),
        }
        Ok(json!({}))
    }

    /// Questions.
    fn ask(&self, command: &str, arguments: &Value) -> Option<Reply> {
        Some(Ok(match command {
            "query-version" => json!({
                "qemu": { "major": self.version.major, "minor": self.version.minor, "micro": 0 },
                "package": "scripted",
            }),
            "query-status" => json!({ "status": self.run_state, "running": self.is_running() }),
            "query-commands" => {
                let known = ["query-status", "stop", "cont", "migrate"].into_iter();
                let active = (self.version.major >= SET_ACTIVE_SINCE).then_some(SET_ACTIVE);
                known.chain(active).map(|name| json!({ "name": name })).collect()
            }
            "query-machines" => json!([{
                "name": self.version.machine_type(), "alias": "q35", "default-ram-id": "pc.ram",
                "is-default": true, "cpu-max": 288,
            }]),
            "query-cpus-fast" => (0..self.vcpus)
                .map(|number| {
                    json!({
                        "cpu-index": number, "thread-id": 100 + number, "target": "x86_64",
                        "qom-path": format!("/machine/unattached/device[{number}]"),
                    })
                })
                .collect(),
            "query-memory-size-summary" => json!({
                "base-memory": self.ram.parts[0].bytes, "plugged-memory": self.plugged_memory,
            }),
            "query-kvm" => json!({ "enabled": false, "present": true }),
            "query-iothreads" => json!([]),
            "query-chardev" => {
                let row = |(id, is_open): &(String, bool)| {
                    let filename = "unix:x,server=on";
                    json!({ "label": id, "filename": filename, "frontend-open": is_open })
                };
                self.chardevs.iter().map(row).collect()
            }
            "query-fdsets" => self
                .sets
                .iter()
                .map(|(id, set)| (id, json!({ "fd": 9, "opaque": set.opaque })))
                .map(|(id, fd)| json!({ "fdset-id": id, "fds": [fd] }))
                .collect(),
            "qom-list" => return Some(self.qom_list(text(arguments, "path"))),
            "qom-get" => {
                let property = text(arguments, "property");
                return Some(self.qom_get(text(arguments, "path"), property));
            }
            "human-monitor-command" => match text(arguments, "command-line") {
                "info ramblock" => json!(self.ram.listing(self.version.major >= 8)),
                _ => json!(""),
            },
            _ => return None,
        }))
    }

    fn qom_list(&self, path: &str) -> Reply {
        let own = json!({ "name": "type", "type": "string" });
        let row =
            |(name, kind): (&str, &str)| json!({ "name": name, "type": format!("child<{kind}>") });
        let rows: Vec<Value> = match path {
            "/objects" => {
                let objects = self.objects.iter().map(|(id, kind)| (id.as_str(), kind.as_str()));
                [("pc.ram", "memory-backend-ram")].into_iter().chain(objects).map(row).collect()
            }
            "/machine/peripheral" | "/machine/peripheral-anon" => {
                let inside = |path: &str, device: &str| {
                    device.strip_prefix(path)?.strip_prefix('/').map(str::to_owned)
                };
                let devices = self.devices.iter();
                let here = devices.filter_map(|(device, kind)| Some((inside(path, device)?, kind)));
                here.map(|(name, kind)| row((&name, kind))).collect()
            }
            "/machine/unattached" => vec![row(("device[0]", "qemu64-x86_64-cpu"))],
            _ => {
                let why = format!("Device '{path}' not found");
                return Err(Refusal { class: "DeviceNotFound", description: why });
            }
        };
        Ok([own].into_iter().chain(rows).collect())
    }

    fn qom_get(&self, path: &str, property: &str) -> Reply {
        match (path, property) {
            ("/machine", "type") => Ok(json!(format!("{}-machine", self.version.machine_type()))),
            ("/machine", "memory-backend") => Ok(json!("/objects/pc.ram")),
            _ => Err(Refusal::generic(format!("Property '{path}.{property}' not found"))),
        }
    }

    fn quit(&mut self) {
        if let Some(process) = &self.process {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
        self.disconnect();
    }

    fn order_cont(&mut self) -> Reply {
        match self.run_state.as_str() {
            "finish-migrate" => Err(Refusal::generic("Migration is not finalized yet")),
            "inmigrate" => Err(Refusal::generic("Guest could not be started")),
            _ => {
                self.cont();
                Ok(json!({}))
            }
        }
    }

    fn object_add(&mut self, arguments: &Value) -> Reply {
        let id = text(arguments, "id");
        if self.objects.iter().any(|(known, _)| known == id) {
            let why =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Refusal::generic(why));
        }
        self.objects.push((id.to_owned(), text(arguments, "qom-type").to_owned()));
        Ok(json!({}))
    }

    fn object_del(&mut self, id: &str) -> Reply {
        match self.objects.iter().position(|(known, _)| known == id) {
            Some(at) => drop(self.objects.remove(at)),
            None => return Err(Refusal::generic(format!("object '{id}' not found"))),
        }
        Ok(json!({}))
    }

    fn add_fd(&mut self, opaque: &str, fd: Option<OwnedFd>) -> Reply {
        let Some(fd) = fd else {
            return Err(Refusal::generic("No file descriptor supplied via SCM_RIGHTS"));
        };
        let id = self.sets.keys().last().map_or(0, |last| last + 1);
        self.sets.insert(id, FdSet { opaque: opaque.to_owned(), file: File::from(fd) });
        Ok(json!({ "fdset-id": id, "fd": 9 }))
    }

    /// The file that `/dev/fdset/N` is.
    pub(crate) fn open_set(&self, filename: &str) -> Result<File, Refusal> {
        let id = filename.strip_prefix("/dev/fdset/").and_then(|id| id.parse().ok());
        let set = id.and_then(|id: u64| self.sets.get(&id));
        let file = set.map(|set| set.file.try_clone().expect("a descriptor"));
        file.ok_or_else(|| {
            Refusal::generic(format!("Could not open '{filename}': Invalid argument"))
        })
    }

    fn save_devices(&mut self, filename: &str) -> Reply {
        let mut file = self.open_set(filename)?;
        let state = crate::device_state("running");
        std::io::Write::write_all(&mut file, &state)
            .map_err(|error| Refusal::generic(format!("An IO error has occurred: {error}")))?;
        Ok(json!({}))
    }
}
