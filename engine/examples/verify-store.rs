//! Reads back what a store holds of a VM, and reports the class of a failure:
//! `cargo run -p engine --example verify-store -- file:///srv/checkpoints web1`

use engine::progress::Silent;
use engine::verify;
use vm::error::Class;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(store), Some(name)) = (arguments.next(), arguments.next()) else {
        return Err("usage: verify-store STORE NAME[@ID]".into());
    };
    match verify::run(&store, &name.parse()?, &Silent).await {
        Ok(report) => println!("{} pages, problems: {:?}", report.pages, report.problems),
        Err(error) if error.class() == Class::Store => {
            println!("the store does not answer, try again later: {}", error.explain());
        }
        Err(error) => println!("{} failed: {}", error.phase(), error.explain()),
    }
    Ok(())
}
