//! An image that a guest needs here, as it comes piece by piece.

use std::time::{Duration, Instant};

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::ImageChunk;
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use super::ComputeService;
use crate::agent::failure::Failure;
use crate::agent::images::{self, Upload};

/// How long the next piece of an image is waited for, of which a slow link has one under way.
const PIECE_TIME: Duration = Duration::from_secs(30);

/// What somebody is told who began to send an image and stopped.
fn silent_upload(hash: Option<&str>) -> Failure {
    Failure::Refused(format!(
        "no piece of image {} came for {} s",
        hash.unwrap_or("(none was named)"),
        PIECE_TIME.as_secs()
    ))
}

impl ComputeService {
    /// Takes an image that is missing here.
    ///
    /// # Errors
    /// It is not missing, another one, damaged or not named, does not come on, or cannot be written.
    pub(super) async fn take_image(&self, mut chunks: Streaming<ImageChunk>) -> Result<(), Status> {
        let mut upload: Option<(Upload, String)> = None;
        while let Some(chunk) = tokio::time::timeout(PIECE_TIME, chunks.next())
            .await
            .map_err(|_| silent_upload(upload.as_ref().map(|(_, hash)| hash.as_str())))?
        {
            let chunk = chunk?;
            let (image, _) = match &mut upload {
                Some(upload) if upload.1 == chunk.hash => upload,
                None if images::is_hash(&chunk.hash) => {
                    if !self.0.expected_images.has(&chunk.hash, Instant::now()) {
                        let why = format!("image {} is not missing on host {}", chunk.hash, self.0.host());
                        return Err(Failure::Refused(why).into());
                    }
                    upload.insert((Upload::begin(&self.0.image_folder())?, chunk.hash.clone()))
                }
                _ => {
                    let problem = "is not one image's hash".to_owned();
                    return Err(Failure::from(InvalidField { field: "hash", problem }).into());
                }
            };
            image.add(&chunk.bytes)?;
        }
        if let Some((image, hash)) = upload {
            // The image is synced to the disk: other tasks go elsewhere meanwhile.
            tokio::task::block_in_place(|| image.finish(Some(&hash)))?;
        }
        Ok(())
    }
}
