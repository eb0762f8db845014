//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use std::error::Error;
use std::path::{Path, PathBuf};

use prost::Message as _;
use protox::prost_reflect::prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new("proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();

    let descriptors = protox::compile(&files, [root])?;
    describe_agents(descriptors.clone())?;
    let rpc = std::env::var_os("CARGO_FEATURE_RPC").is_some();
    let mut builder = tonic_prost_build::configure()
        .build_client(rpc)
        .build_server(rpc)
        // Guest memory comes by in these: what was read off a socket is shared, not copied.
        .bytes(".ferry.agent.v1.StreamPiece.bytes");
    if rpc {
        // These are printed as JSON by the command line and kept as JSON in the journal, under their field names.
        for message in [
            "InstanceSpec",
            "DiskSpec",
            "NicSpec",
            "InstanceInfo",
            "InstanceEvent",
            "InstanceFault",
            "Balloon",
            "SnapshotInfo",
            "MigrationInfo",
            "MigrationOptions",
            "DowntimeMs",
            "Round",
            "MigrationDecision",
            "Verified",
            "NetworkGap",
            "Compressed",
            "HostInfo",
            "HostVerdict",
            "Check",
            "Refusal",
            "MigrationPrediction",
            "PredictedRemedy",
            "WrittenBy",
            "WrittenPart",
            "DirtyPart",
            "LiveMigrateReply",
        ] {
            builder = builder.type_attribute(
                format!(".ferry.agent.v1.{message}"),
                "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]",
            );
        }
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}

/// What clients that know no `.proto` file are told of the services: without comments, and without what agents do not serve.
fn describe_agents(mut descriptors: FileDescriptorSet) -> Result<(), Box<dyn Error>> {
    descriptors.file.retain(|file| file.package() == "ferry.agent.v1");
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    Ok(std::fs::write(
        Path::new(&out).join("agent.descriptors"),
        descriptors.encode_to_vec(),
    )?)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
