//! Which form of message content a template wants, found as vLLM finds it: by its loops.
//!
//! A template that loops over the `content` of a message that it got by looping over `messages` takes
//! lists of parts; any other takes strings. Variables that `set` or a loop gave another name are
//! followed, through filters, tests and slices, without regard to scope.

use std::collections::VecDeque;

use minijinja::{
    machinery::{
        ast::{Expr, Stmt},
        parse,
    },
    syntax::SyntaxConfig,
};

/// The form of `message.content` that a template takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// One string; parts are joined by newlines.
    String,
    /// A list of parts, as in the API of OpenAI.
    Parts,
}

/// The form that a template takes; strings if it cannot be told.
pub(super) fn detect(source: &str, syntax: SyntaxConfig) -> ContentFormat {
    let Ok(tree) = parse(source, "", syntax) else { return ContentFormat::String };
    let (mut loops, mut assignments) = (Vec::new(), Vec::new());
    collect(&tree, &mut loops, &mut assignments);
    let messages = names_of("messages", &assignments);
    let Some(items) = targets(&loops, &messages, None) else { return ContentFormat::String };
    match targets(&loops, &items, Some("content")) {
        Some(contents) if !contents.is_empty() => ContentFormat::Parts,
        _ => ContentFormat::String,
    }
}

type Pair<'t, 's> = (&'t Expr<'s>, &'t Expr<'s>);

/// Loops as (target, what is looped over), assignments as (target, value), in the whole tree.
fn collect<'t, 's>(
    statement: &'t Stmt<'s>,
    loops: &mut Vec<Pair<'t, 's>>,
    assignments: &mut Vec<Pair<'t, 's>>,
) {
    let bodies: [&[Stmt<'s>]; 2] = match statement {
        Stmt::Template(template) => [&template.children, &[]],
        Stmt::ForLoop(each) => {
            loops.push((&each.target, &each.iter));
            [&each.body, &each.else_body]
        }
        Stmt::IfCond(branch) => [&branch.true_body, &branch.false_body],
        Stmt::WithBlock(block) => [&block.body, &[]],
        Stmt::Set(set) => {
            assignments.push((&set.target, &set.expr));
            [&[], &[]]
        }
        Stmt::SetBlock(block) => [&block.body, &[]],
        Stmt::AutoEscape(block) => [&block.body, &[]],
        Stmt::FilterBlock(block) => [&block.body, &[]],
        Stmt::Block(block) => [&block.body, &[]],
        Stmt::Macro(defined) => [&defined.body, &[]],
        Stmt::CallBlock(call) => [&call.macro_decl.body, &[]],
        _ => [&[], &[]],
    };
    for inner in bodies.into_iter().flatten() {
        collect(inner, loops, assignments);
    }
}

/// A name and every name that it was assigned to, directly or over others.
fn names_of<'s>(name: &'s str, assignments: &[Pair<'_, 's>]) -> Vec<&'s str> {
    let mut names = vec![name];
    let mut open = VecDeque::from([name]);
    while let Some(name) = open.pop_front() {
        for (target, value) in assignments {
            let Expr::Var(target) = target else { continue };
            if accesses(value, name, None) && !names.contains(&target.id) {
                names.push(target.id);
                open.push_back(target.id);
            }
        }
    }
    names
}

/// The loop variables of loops over one of the names, or over their `key`. `None` if such a loop
/// unpacks its items, which nobody does to messages.
fn targets<'s>(loops: &[Pair<'_, 's>], names: &[&str], key: Option<&str>) -> Option<Vec<&'s str>> {
    let over = |iter: &Expr<'_>| names.iter().any(|name| accesses(iter, name, key));
    let found = loops.iter().filter(|(_, iter)| over(iter));
    found
        .map(|(target, _)| match target {
            Expr::Var(target) => Some(target.id),
            _ => None,
        })
        .collect()
}

/// Whether an expression is the variable, or its `key`, perhaps filtered, tested or sliced.
fn accesses(expression: &Expr<'_>, name: &str, key: Option<&str>) -> bool {
    match (expression, key) {
        (Expr::Filter(filter), _) => {
            filter.expr.as_ref().is_some_and(|inner| accesses(inner, name, key))
        }
        (Expr::Test(test), _) => accesses(&test.expr, name, key),
        (Expr::Slice(slice), _) => accesses(&slice.expr, name, key),
        (Expr::GetAttr(access), Some(key)) => access.name == key && is_name(&access.expr, name),
        (Expr::GetItem(access), Some(key)) => {
            let Expr::Const(subscript) = &access.subscript_expr else { return false };
            subscript.value.as_str() == Some(key) && is_name(&access.expr, name)
        }
        (expression, None) => is_name(expression, name),
        _ => false,
    }
}

fn is_name(expression: &Expr<'_>, name: &str) -> bool {
    matches!(expression, Expr::Var(variable) if variable.id == name)
}
