//! What prost and tonic generate. Documented in the `.proto` files.

macro_rules! package {
    ($(#[$doc:meta])* $name:ident, $package:literal) => {
        $(#[$doc])*
        pub mod $name {
            /// Version 1.
            #[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated code; which of these apply depends on the package")]
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
            }
        }
    };
}

package!(
    /// Agents: `ferry.agent`.
    agent,
    "ferry.agent.v1"
);
package!(
    /// Saved machines: `ferry.state`.
    state,
    "ferry.state.v1"
);
package!(
    /// The control stream of a migration: `ferry.stream`.
    stream,
    "ferry.stream.v1"
);
package!(
    /// Agent and VMM: `ferry.vmm`.
    vmm,
    "ferry.vmm.v1"
);
