//! A short-lived QEMU without a VM that makes and fills disk images.
//!
//! It writes every format just as the QEMU does that will open the image, so no format is written
//! here; and its NBD export takes data as fast as we send it.
//!
//! A slow disk holds up QEMU's main loop, and with it the answer to any command. So a worker gets
//! minutes where a QEMU with a guest gets seconds, and only one that answers nothing at all any
//! more is replaced ([`ImageWorkers`]).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;
use tokio::process::{Child, Command};

use crate::disks::{ImageFormat, Qcow2Layout};
use crate::jobs::{self, JobError};
use crate::nbd::{NbdClient, NbdError};
use crate::qmp::{Qmp, QmpError};
use crate::said;

/// A QEMU without a VM greets after 50 ms; a loaded host may need many times as long.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one command of the worker, or one job, may take: nothing but the storage can hold it
/// up.
const TIMEOUT: Duration = Duration::from_secs(300);
/// A wait that is longer than this is logged, again after each such interval.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// How long a worker that has failed gets to show that it still listens.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Workers that one image may use up.
const TRIES: u32 = 3;
/// Longest backing name a qcow2 header can hold.
pub const MAX_BACKING_NAME: usize = 1023;

#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ImageError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nbd(#[from] NbdError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("cannot start the image worker {binary}: {source}; name a QEMU system emulator")]
    Start { binary: PathBuf, source: std::io::Error },
    #[error(
        "the image worker {binary} did not come up: {source}; it said: {said}; try `{binary} -machine none` by hand"
    )]
    Silent { binary: PathBuf, source: QmpError, said: String },
    #[error("cannot make the image {path}: {why}")]
    Create { path: PathBuf, why: String },
    #[error("cannot open the image {path}: {source}")]
    Open { path: PathBuf, source: QmpError },
    #[error("the path {path} is not UTF-8, and QMP can carry no other")]
    Path { path: PathBuf },
    #[error(
        "the image worker did not end within {EXIT_TIMEOUT:?}; it was killed; images that were not closed may lack data"
    )]
    Exit,
}

/// What an image stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// A path, or `json:{…}` for anything that QEMU can open.
    pub file: String,
    /// The format of that image.
    pub format: ImageFormat,
}

/// An image to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSpec {
    /// Where it will be.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// What its reader sees, in bytes.
    pub virtual_size: u64,
    /// qcow2 only. It need not exist yet.
    pub backing: Option<Backing>,
    /// qcow2 only; QEMU's defaults unless given.
    pub layout: Option<Qcow2Layout>,
}

/// How an image is opened to be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingMode {
    /// With its backing chain: what is not written keeps showing through, whatever the size of a
    /// write.
    Chain,
    /// Alone, so that the chain need not exist. The rest of a cluster written in part becomes
    /// zeroes!
    Alone,
}

/// The worker; dropping kills it.
#[derive(Debug)]
pub struct ImageWorker {
    qmp: Qmp,
    child: Child,
    directory: PathBuf,
    images: u64,
    serving: bool,
}

/// An image open in the worker.
#[derive(Debug)]
pub struct OpenImage {
    /// The image's content, for reading and writing.
    pub client: NbdClient,
    node: String,
    path: PathBuf,
}

impl ImageWorker {
    /// Starts `binary`; its socket and its log are in `directory`, whose path should be short
    /// (sockets allow 107 bytes).
    ///
    /// # Errors
    /// When QEMU does not start, or its sockets cannot be made.
    pub async fn start(binary: &Path, directory: &Path) -> Result<Self, ImageError> {
        let start_error = |source| ImageError::Start { binary: binary.into(), source };
        let (ours, theirs) = UnixStream::pair().map_err(start_error)?;
        let log = directory.join("image-worker.log");
        let said = File::create(&log).map_err(start_error)?;
        let child = Command::new(binary)
            .args(["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"])
            // Its standard input is its monitor.
            .args(["-chardev", "socket,id=qmp,fd=0", "-mon", "chardev=qmp,mode=control"])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(said)
            .kill_on_drop(true)
            .spawn()
            .map_err(start_error)?;
        let qmp = Qmp::over(ours, START_TIMEOUT).await;
        let qmp = qmp.map_err(|source| ImageError::Silent {
            binary: binary.into(),
            source,
            said: last_lines(&log),
        })?;
        Ok(Self {
            qmp: qmp.with_timeout(TIMEOUT),
            child,
            directory: directory.into(),
            images: 0,
            serving: false,
        })
    }

    /// For other queries to a QEMU without a VM, e.g. `query-machines`.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Makes an empty image. The file must not exist.
    ///
    /// # Errors
    /// When the image exists, or QEMU refuses to make it.
    pub async fn create(&mut self, spec: &ImageSpec) -> Result<(), ImageError> {
        patiently("making", &spec.path, self.make(spec)).await
    }

    async fn make(&mut self, spec: &ImageSpec) -> Result<(), ImageError> {
        let refuse = |why: String| Err(ImageError::Create { path: spec.path.clone(), why });
        match &spec.backing {
            Some(_) if spec.format == ImageFormat::Raw => {
                return refuse("a raw image cannot have a backing file".into());
            }
            Some(backing) if backing.file.len() > MAX_BACKING_NAME => {
                return refuse(format!(
                    "the name of its backing file is longer than {MAX_BACKING_NAME} bytes"
                ));
            }
            _ => {}
        }
        // Made here, since QEMU would overwrite a file that exists.
        if let Err(error) =
            std::fs::OpenOptions::new().write(true).create_new(true).open(&spec.path)
        {
            return refuse(error.to_string());
        }
        let filename = utf8(&spec.path)?;
        let file_bytes = if spec.format == ImageFormat::Raw { spec.virtual_size } else { 0 };
        self.job(spec, json!({ "driver": "file", "filename": filename, "size": file_bytes }))
            .await?;
        if spec.format == ImageFormat::Raw {
            return Ok(());
        }
        let node = self.next_node();
        self.qmp
            .execute_json(
                "blockdev-add",
                json!({ "driver": "file", "node-name": node, "filename": filename }),
            )
            .await?;
        let mut options = json!({ "driver": "qcow2", "file": node, "size": spec.virtual_size });
        if let Some(backing) = &spec.backing {
            options["backing-file"] = backing.file.as_str().into();
            options["backing-fmt"] = backing.format.as_str().into();
        }
        if let Some(layout) = &spec.layout {
            add_layout(&mut options, layout);
        }
        let made = self.job(spec, options).await;
        self.qmp.execute_json("blockdev-del", json!({ "node-name": node })).await?;
        made
    }

    async fn job(&mut self, spec: &ImageSpec, options: Value) -> Result<(), ImageError> {
        let job = self.next_node();
        jobs::create_image(&self.qmp, &job, options).await.map_err(|error| match error {
            JobError::Qmp(error) if !error.is_refusal() => ImageError::Qmp(error),
            other => ImageError::Create { path: spec.path.clone(), why: other.to_string() },
        })
    }

    fn next_node(&mut self) -> String {
        self.images += 1;
        format!("image-{}", self.images)
    }

    /// Opens an image for reading and writing over NBD.
    ///
    /// # Errors
    /// When QEMU refuses to open or export the image.
    pub async fn open(
        &mut self,
        path: &Path,
        format: ImageFormat,
        mode: BackingMode,
    ) -> Result<OpenImage, ImageError> {
        patiently("opening", path, self.export(path, format, mode)).await
    }

    async fn export(
        &mut self,
        path: &Path,
        format: ImageFormat,
        mode: BackingMode,
    ) -> Result<OpenImage, ImageError> {
        let socket = self.directory.join("image-worker.nbd");
        self.serve(&socket).await?;
        let node = self.next_node();
        let is_device =
            std::fs::metadata(path).is_ok_and(|facts| facts.file_type().is_block_device());
        let driver = if is_device { "host_device" } else { "file" };
        let mut options = json!({
            "driver": format.as_str(), "node-name": node, "discard": "unmap",
            "file": { "driver": driver, "filename": utf8(path)?, "discard": "unmap" },
        });
        if mode == BackingMode::Alone && format == ImageFormat::Qcow2 {
            options["backing"] = Value::Null;
        }
        let added = self.qmp.execute_json("blockdev-add", options).await;
        added.map_err(|source| ImageError::Open { path: path.into(), source })?;
        let export =
            json!({ "type": "nbd", "id": node, "name": node, "node-name": node, "writable": true });
        self.qmp.execute_json("block-export-add", export).await?;
        let client = NbdClient::connect(&socket, &node, &[]).await?;
        Ok(OpenImage { client, node, path: path.into() })
    }

    async fn serve(&mut self, socket: &Path) -> Result<(), ImageError> {
        if !self.serving {
            let _ = std::fs::remove_file(socket);
            let address = json!({ "type": "unix", "data": { "path": utf8(socket)? } });
            self.qmp.execute_json("nbd-server-start", json!({ "addr": address })).await?;
            self.serving = true;
        }
        Ok(())
    }

    /// Flushes and closes an image; after this its file is complete.
    ///
    /// # Errors
    /// When QEMU reports an error of an earlier write, or refuses to close the image.
    pub async fn close(&mut self, image: OpenImage) -> Result<(), ImageError> {
        let path = image.path.clone();
        patiently("closing", &path, self.finish(image)).await
    }

    async fn finish(&mut self, image: OpenImage) -> Result<(), ImageError> {
        image.client.flush().await?;
        image.client.close().await;
        jobs::remove_exports(&self.qmp, |id| id == image.node).await?;
        self.qmp.execute_json("blockdev-del", json!({ "node-name": image.node })).await?;
        Ok(())
    }

    /// Ends the worker.
    ///
    /// # Errors
    /// When QEMU does not end.
    pub async fn shutdown(mut self) -> Result<(), ImageError> {
        self.qmp.execute(qapi::qmp::quit {}).await?;
        match tokio::time::timeout(EXIT_TIMEOUT, self.child.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ImageError::Exit),
        }
    }

    /// Whether it still lives and listens.
    async fn answers(&self) -> bool {
        self.qmp.with_timeout(ANSWER_TIMEOUT).execute(qapi::qmp::query_version {}).await.is_ok()
    }
}

/// Workers one after the other, each for as many images as it lives for.
#[derive(Debug)]
pub struct ImageWorkers {
    binary: PathBuf,
    directory: PathBuf,
    worker: Option<ImageWorker>,
}

impl ImageWorkers {
    /// None is started yet. For the arguments see [`ImageWorker::start`].
    pub fn new(binary: &Path, directory: &Path) -> Self {
        Self { binary: binary.into(), directory: directory.into(), worker: None }
    }

    /// Does `work` for one image; from its beginning, with a fresh worker, if the worker is dead or
    /// hangs after a failure. So `work` has to clear away what an earlier call of it left.
    ///
    /// # Errors
    /// When `work` fails, or no worker can be started.
    pub async fn run<T, E>(
        &mut self,
        mut work: impl AsyncFnMut(&mut ImageWorker) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<ImageError> + std::fmt::Display,
    {
        let mut left = TRIES;
        loop {
            let mut worker = match self.worker.take() {
                Some(worker) => worker,
                None => ImageWorker::start(&self.binary, &self.directory).await?,
            };
            left -= 1;
            match work(&mut worker).await {
                Err(error) if !worker.answers().await => {
                    if left == 0 {
                        return Err(error);
                    }
                    tracing::warn!(%error, "the QEMU that writes the image is dead or hangs; the image is begun again with another");
                }
                outcome => {
                    self.worker = Some(worker);
                    return outcome;
                }
            }
        }
    }

    /// Ends the worker. Every image that was closed is complete, so one that does not end in time
    /// is only told of.
    pub async fn shutdown(self) {
        if let Some(worker) = self.worker
            && let Err(error) = worker.shutdown().await
        {
            tracing::warn!(%error, "ending the QEMU that wrote images");
        }
    }
}

/// Tells of a wait that is long.
async fn patiently<T>(doing: &str, path: &Path, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let mut work = pin!(work);
    loop {
        match tokio::time::timeout(SAY_EVERY, &mut work).await {
            Ok(done) => return done,
            Err(_) => {
                let seconds = begun.elapsed().as_secs();
                tracing::warn!(
                    "{doing} the image {} has taken {seconds} s so far; its storage may be slow",
                    path.display()
                );
            }
        }
    }
}

/// An image of version 2 knows none of the other options.
fn add_layout(options: &mut Value, layout: &Qcow2Layout) {
    options["cluster-size"] = layout.cluster_size.into();
    if layout.compat == "0.10" {
        options["version"] = "v2".into();
        return;
    }
    options["version"] = "v3".into();
    options["lazy-refcounts"] = layout.lazy_refcounts.into();
    options["refcount-bits"] = layout.refcount_bits.into();
    options["extended-l2"] = layout.extended_l2.into();
    options["compression-type"] = layout.compression.as_str().into();
}

fn last_lines(log: &Path) -> String {
    let said = said::quote_log(log);
    if said.is_empty() { "nothing".into() } else { said }
}

fn utf8(path: &Path) -> Result<&str, ImageError> {
    path.to_str().ok_or_else(|| ImageError::Path { path: path.into() })
}
