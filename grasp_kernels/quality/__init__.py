"""How well a remedy works: dishes with a planted factor, methods, scores.

dishes     what is planted, in models of which size: configuration alone
folder     dish and seed -> checkpoint folder and chat file, made once
workbench  what a method may use: fresh adapters, training, subspaces
methods    a name -> one small function: workbench and strength -> model
scores     model -> task, drift, obedience, movement, divergence
harness    dishes × methods × seeds -> rows; strengths are tuned on other seeds
report     rows -> paired differences, tables, figures
"""
